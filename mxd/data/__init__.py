"""Text: documents, rows of tokens, labelled text, and whether a text was trained on."""
