"""One module per `mode=`; each has one function `run(config)`."""
