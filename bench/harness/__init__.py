"""What every measurement needs: cases, gates, timing, records."""
