package redis_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// BenchmarkPublish compares 64 goroutines that publish 128 bytes on one channel, with
// one subscriber, to go-redis' own PUBLISH in pipelines of a hundred by 64 goroutines,
// in one run. The first keeps and orders what it sends, the second does not.
func BenchmarkPublish(b *testing.B) {
	const publishers, pipeline = 64, 100
	ctx := context.Background()
	f := newFixture(b, testserver.RedisConfig{})
	msg := make([]byte, 128)

	// spread divides b.N among the publishers and reports messages per second.
	spread := func(b *testing.B, step int, publish func(n int) error) {
		var wg sync.WaitGroup
		b.ResetTimer()
		start := time.Now()
		for p := range publishers {
			wg.Go(func() {
				for i := p * step; i < b.N; i += publishers * step {
					if err := publish(min(step, b.N-i)); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "msg/s")
	}

	b.Run(fmt.Sprintf("dchannel/publishers=%d", publishers), func(b *testing.B) {
		backend := redis.New(f.client(f.server.Addr()), quiet)
		defer backend.Close()
		listener, err := dchannel.Open(ctx, "bench", backend)
		require.NoError(b, err)
		defer func() { _ = listener.Detach() }()
		var wg sync.WaitGroup
		wg.Go(func() {
			for range b.N {
				if _, err := listener.Next(ctx); err != nil {
					b.Error(err)
					return
				}
			}
		})
		ch := dchannel.New("bench", backend)
		defer func() { _ = ch.Detach() }()
		spread(b, 1, func(int) error { return ch.Publish(ctx, msg) })
		wg.Wait() // nothing was lost
	})
	b.Run("goredis/PUBLISH/pipeline=100", func(b *testing.B) {
		client := f.client(f.server.Addr())
		sub := f.client(f.server.Addr()).Subscribe(ctx, "raw")
		defer sub.Close()
		_, err := sub.Receive(ctx)
		require.NoError(b, err)
		go func() {
			for {
				if _, err := sub.Receive(ctx); err != nil {
					return
				}
			}
		}()
		spread(b, pipeline, func(n int) error {
			p := client.Pipeline()
			for range n {
				p.Publish(ctx, "raw", msg)
			}
			_, err := p.Exec(ctx)
			return err
		})
	})
}
