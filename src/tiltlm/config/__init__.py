"""Run files, study files and their parts. No torch here."""
