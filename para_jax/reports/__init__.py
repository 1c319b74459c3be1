"""What a folder holds, as text and as plots."""
