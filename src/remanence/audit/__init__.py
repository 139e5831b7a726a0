"""Did this model see this data? Membership inference, Deja Vu, radioactive data."""
