"""Libraries whose models tp_rs runs."""
