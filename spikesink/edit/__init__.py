"""What changes without it: interventions with matched controls, their outcomes, probes, int8."""
