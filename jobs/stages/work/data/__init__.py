"""What stages read and write, as rows or files."""
