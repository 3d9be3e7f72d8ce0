"""Files that last: durable writes, digests, rows of long work, and errors of the operating system in words."""
