package etcd_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

// A free lock taken and given back, and one that another holds asked for.
func BenchmarkLock(b *testing.B) {
	be := backend(b, connect(b, server(b).URL()))
	b.Run("AcquireRelease", func(b *testing.B) {
		for b.Loop() {
			token := dchannel.NewID()
			require.True(b, acquire(b, be, "free", token, hour).Mine)
			_, err := be.Release(b.Context(), "free", token)
			require.NoError(b, err)
		}
	})
	acquire(b, be, "held", dchannel.NewID(), hour)
	b.Run("Refused", func(b *testing.B) {
		for b.Loop() {
			require.False(b, acquire(b, be, "held", dchannel.NewID(), hour).Mine)
		}
	})
}
