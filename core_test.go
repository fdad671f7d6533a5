package dchannel_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSmoke(t *testing.T) {
	ctx, done := context.WithTimeout(context.Background(), 10*time.Second)
	defer done()
	b := memory.New()
	defer b.Close()
	a, err := dchannel.Open(ctx, "x", b)
	require.NoError(t, err)
	c, err := dchannel.Open(ctx, "x", b)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for _, h := range []*dchannel.Channel{a, c} {
		wg.Go(func() {
			for i := range 1000 {
				v, err := h.Listen(ctx)
				if err != nil || v != fmt.Sprint(i) {
					t.Errorf("%d: %v %v", i, v, err)
					return
				}
			}
			_, err := h.Listen(ctx)
			require.ErrorIs(t, err, dchannel.ErrChanClosed)
		})
	}
	p := dchannel.New("x", b)
	for i := range 1000 {
		if i%2 == 0 {
			require.NoError(t, p.PublishAsync(ctx, fmt.Sprint(i)))
		} else {
			require.NoError(t, p.Publish(ctx, fmt.Sprint(i)))
		}
	}
	require.NoError(t, p.Flush(ctx))
	require.NoError(t, p.Close())
	wg.Wait()
	require.True(t, a.IsClosed())
	late, err := dchannel.Open(ctx, "x", b, dchannel.WithStart(dchannel.FromOldest()))
	require.NoError(t, err)
	for range 1000 {
		_, err = late.Listen(ctx)
		require.NoError(t, err)
	}
	_, err = late.Listen(ctx)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	fmt.Printf("%+v\n", a.Status())
}
