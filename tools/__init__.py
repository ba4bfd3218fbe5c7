"""Scripts that made what ships: trained models and fitted parameters. Not part of the wheel."""
