"""What levers cost in images: the table, the floor, and the study that fills the table."""
