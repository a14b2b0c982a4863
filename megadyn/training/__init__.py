"""The run itself: engine, optimizer, evaluation, telemetry, guard."""
