"""What the admin of a labelling service sees and does: figures, people, batches, exports."""
