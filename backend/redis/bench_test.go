package redis_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// BenchmarkAppend compares an append, one at a time on a channel as the core does it,
// with a bare PUBLISH of the same bytes, with one subscriber each.
func BenchmarkAppend(b *testing.B) {
	f := &fixture{t: b, server: testserver.RedisForTest(b, testserver.RedisConfig{
		// The server drops a subscriber that is 32 MiB behind; that is not measured here.
		Config: []string{"client-output-buffer-limit pubsub 0 0 0"},
	})}
	client := f.client(f.server.Addr())
	ctx := context.Background()
	for _, size := range []int{128, 4096, 64 << 10} {
		for _, channels := range []int{1, 8} {
			data := make([]byte, size)
			name := fmt.Sprintf("bytes=%d/channels=%d", size, channels)
			b.Run("publish/"+name, func(b *testing.B) {
				var got atomic.Int64
				sub := client.Subscribe(ctx)
				for c := range channels {
					require.NoError(b, sub.Subscribe(ctx, fmt.Sprint("bare", c)))
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					for {
						m, err := sub.Receive(ctx)
						if err != nil {
							return
						}
						if _, ok := m.(*goredis.Message); ok {
							got.Add(1)
						}
					}
				})
				measure(b, size, channels, &got, func(c int) error {
					return client.Publish(ctx, fmt.Sprint("bare", c), data).Err()
				})
				sub.Close()
				wg.Wait()
			})
			b.Run("append/"+name, func(b *testing.B) {
				var got atomic.Int64
				backend := redis.New(client, quiet)
				for c := range channels {
					_, err := backend.Subscribe(ctx, fmt.Sprint(c), entries{&got})
					require.NoError(b, err)
				}
				measure(b, size, channels, &got, func(c int) error {
					_, err := backend.Publish(ctx, fmt.Sprint(c), dchannel.Frame{ID: dchannel.NewID(), Count: 32, Data: data})
					return err
				})
				for c := range channels {
					require.NoError(b, backend.Remove(ctx, fmt.Sprint(c)))
				}
				require.NoError(b, backend.Close())
			})
		}
	}
}

// measure publishes b.N times, on all channels at once, until all of it has arrived.
func measure(b *testing.B, size, channels int, got *atomic.Int64, publish func(c int) error) {
	b.SetBytes(int64(size))
	b.ResetTimer()
	var wg sync.WaitGroup
	for c := range channels {
		wg.Go(func() {
			for i := c; i < b.N; i += channels {
				if err := publish(c); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	eventually(b, "all have arrived", func() bool { return int(got.Load()) >= b.N })
	b.StopTimer()
}

type entries struct{ n *atomic.Int64 }

func (e entries) Entry(dchannel.Entry)      { e.n.Add(1) }
func (entries) Resync(error)                {}
func (entries) State(dchannel.State, error) {}
