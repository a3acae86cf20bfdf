"""Captioners: pictures in, sentences out, from the model to the page that shows where each word was decided."""
