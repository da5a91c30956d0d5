"""What was found: tables, comparisons, and one directory per run that resumes."""
