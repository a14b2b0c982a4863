"""Turns text into a dataset: finds and reads files, tokenizes in many processes, joins the results. No torch in here."""
