"""The thesis itself: its chapters as studies over the three libraries, their claims and reports."""
