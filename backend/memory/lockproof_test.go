package memory_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/internal/lockproof"
)

func TestLockProofWakeUps(t *testing.T) {
	store := memory.NewStore()
	lockproof.WakeUps(t, func() dchannel.Backend {
		b := store.Backend()
		t.Cleanup(func() { assert.NoError(t, b.Close()) })
		return b
	}, 500, 20*time.Millisecond)
}
