"""Projects that come with the package; each folder below is whole by itself and can be run, copied and edited."""
