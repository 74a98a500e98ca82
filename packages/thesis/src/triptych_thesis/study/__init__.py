"""What the studies of all chapters share."""
