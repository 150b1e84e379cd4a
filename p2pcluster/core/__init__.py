"""The pure core: no socket, clock, chance, file or log is reached from here; all of them are arguments."""
