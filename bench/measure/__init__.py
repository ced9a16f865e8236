"""Time, check and record a call.  No module here knows what is timed."""
