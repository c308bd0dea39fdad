"""Earlier versions, as wheels beside this file, to run beside today's: see README.md."""
