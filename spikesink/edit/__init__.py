"""Interventions on spikes and sinks with matched controls, their outcomes, probes of the edited model, and int8."""
