"""What the commands share: complaints, progress bars and tables."""
