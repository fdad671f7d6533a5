package dchannel

import (
	"fmt"
	"unicode"
	"unicode/utf8"
)

// MaxNameLen is the longest channel name, in bytes.
const MaxNameLen = 255

func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: it is empty", ErrInvalidName)
	case len(name) > MaxNameLen:
		return fmt.Errorf("%w: %.40q… has %d bytes, the limit is %d", ErrInvalidName, name, len(name), MaxNameLen)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %q is not UTF-8", ErrInvalidName, name)
	}
	for i, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: %q has the control character %U at byte %d", ErrInvalidName, name, r, i)
		}
	}
	return nil
}
