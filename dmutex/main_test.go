package dmutex_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/dmutex"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs f in fake time. What it starts must be over when it returns.
func bubble(t *testing.T, f func(t *testing.T, s *memory.Store)) {
	synctest.Test(t, func(t *testing.T) { f(t, memory.NewStore()) })
}

// process returns a mutex of one more process.
func process(t *testing.T, s *memory.Store, ttl time.Duration, opts ...dmutex.Option) *dmutex.Mutex {
	b := s.Backend()
	m := dmutex.New("k", ttl, b, opts...)
	t.Cleanup(func() {
		_ = m.Close()
		assert.NoError(t, b.Close())
	})
	return m
}
