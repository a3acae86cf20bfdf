"""What goes to the Hub beside weights and config."""
