"""The explorer: a page on which to search, read and steer experts, served here or exported as a static folder."""
