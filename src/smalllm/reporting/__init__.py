"""A page about runs: what is known of them, drawn and written."""
