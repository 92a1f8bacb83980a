"""The stages of a run: what each makes and how."""
