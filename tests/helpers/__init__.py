"""Small tools the tests share."""
