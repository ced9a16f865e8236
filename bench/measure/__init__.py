"""How a call is timed, checked and recorded: nothing here knows what is timed."""
