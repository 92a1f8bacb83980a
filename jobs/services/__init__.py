"""Web services beside the runs. They read and write artifacts, and import no stage."""
