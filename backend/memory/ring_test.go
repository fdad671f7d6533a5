package memory

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

// TestRing compares the ring with a slice.
func TestRing(t *testing.T) {
	t.Parallel()
	var r ring
	var want []uint64
	next := uint64(1)
	for step := range 20_000 {
		grow := 2 + 5*(step/2000%2) // of 10: shrinks and grows in turn
		switch k := rand.IntN(10); {
		case k <= grow:
			r.push(dchannel.Entry{Position: dchannel.Position{Seq: next}, Data: []byte{1}})
			want = append(want, next)
			next++
		case len(want) == 0:
		case k == 9:
			r.popLast()
			want = want[:len(want)-1]
		default:
			r.popFirst()
			want = want[1:]
		}
		require.Equal(t, len(want), r.n)
		if step%100 == 0 {
			held := 0
			for _, e := range r.buf {
				if e.Data != nil {
					held++
				}
			}
			require.Equal(t, len(want), held, "what was taken out is let go")
			require.LessOrEqual(t, len(r.buf), max(minRing, 4*len(want)))
			for i, seq := range want {
				require.Equal(t, seq, r.at(i).Seq)
				require.Equal(t, i+1, r.after(seq))
				require.Equal(t, i, r.after(seq-1))
			}
		}
	}
}
