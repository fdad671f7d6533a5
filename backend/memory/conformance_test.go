package memory_test

import (
	"testing"

	"github.com/dchannel/dchannel/conformance"
)

func TestConformance(t *testing.T) {
	h := conformance.Memory()
	h.Strict = true
	conformance.Run(t, h)
}
