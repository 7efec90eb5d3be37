"""What is seen in a model: spikes, sinks, their nulls and their anatomy. Never changes what it measures."""
