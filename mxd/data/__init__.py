"""Text: documents, rows of tokens, labelled text."""
