"""Rows and labels from files, folders and the Hub."""
