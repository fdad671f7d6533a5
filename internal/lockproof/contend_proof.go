package lockproof

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel/internal/drivertest"
)

// TwoHundredContenders has 200 contenders in 10 processes lock one channel once each, and
// prints how often they ask for it and how fast it goes from one to the next. kinds says
// how many attempts each kind of lock ("wait", "fair") may take on average.
func TwoHundredContenders(t *testing.T, rig drivertest.Rig, kinds map[string]float64) {
	for kind, most := range kinds {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		f, err := Contend(ctx, Contest{
			Addr: rig.Server.Addr(), Channel: t.Name() + "/" + kind, Kind: kind, Processes: 10, Goroutines: 20,
		})
		cancel()
		require.NoError(t, err)
		t.Logf("200 contenders in 10 processes, %s: %v", kind, f)
		assert.Equal(t, 200, f.Locks)
		assert.Zero(t, f.Overlaps)
		assert.LessOrEqual(t, f.PerLock(), most, kind)
	}
}
