"""DER: dynamically expandable representation, with channel masks."""
