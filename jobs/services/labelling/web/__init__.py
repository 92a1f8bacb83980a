"""The service: a web application in one process."""
