"""The parts that all ops share."""
