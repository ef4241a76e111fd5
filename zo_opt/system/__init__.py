"""What the package asks of the machine: whole files, locks, plain JSON of strangers, memory."""
