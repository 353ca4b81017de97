"""What several test folders share: the universal check, the zoo's builder and the sweep's reporting."""
