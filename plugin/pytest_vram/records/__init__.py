"""What was found: the schema of a record, run files and the journal."""
