// Package lock_test compares the channel's lock on Redis with another library's, on the
// same server, in the same run:
//
//	make bench BENCH=Contenders
//
// Every contender locks one name once, and works for a millisecond under the lock. They are
// spread over processes of the operating system. attempts/lock is how often the server
// was asked for the lock; the hand-over is the time from before one's release to behind
// the next one's lock call.
package lock_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	goredislib "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) {
	if lockproof.Child(open, map[string]lockproof.Contender{"redsync": contender}) {
		return
	}
	os.Exit(m.Run())
}

func open(addr string) (dchannel.Backend, error) {
	client := goredislib.NewClient(&goredislib.Options{Addr: addr})
	return redis.New(client, redis.WithLogger(slog.New(slog.NewTextHandler(io.Discard, nil)))), nil
}

// contender is redsync with its own delays between attempts, and without its limit of 32
// of them, which not all of many contenders would keep.
func contender(addr, name string) (lock func(context.Context) (func() error, error), attempts func() int64, err error) {
	client := goredislib.NewClient(&goredislib.Options{Addr: addr})
	var sets counter
	client.AddHook(&sets)
	rs := redsync.New(goredis.NewPool(client))
	lock = func(ctx context.Context) (func() error, error) {
		m := rs.NewMutex(name, redsync.WithExpiry(time.Minute), redsync.WithTries(math.MaxInt))
		return func() error {
			ok, err := m.UnlockContext(ctx)
			if err == nil && !ok {
				err = errors.New("it was not locked")
			}
			return err
		}, m.LockContext(ctx)
	}
	return lock, sets.Load, client.Ping(context.Background()).Err()
}

// counter counts the attempts to set a key.
type counter struct{ atomic.Int64 }

func (c *counter) DialHook(next goredislib.DialHook) goredislib.DialHook { return next }
func (c *counter) ProcessPipelineHook(next goredislib.ProcessPipelineHook) goredislib.ProcessPipelineHook {
	return next
}

func (c *counter) ProcessHook(next goredislib.ProcessHook) goredislib.ProcessHook {
	return func(ctx context.Context, cmd goredislib.Cmder) error {
		if n := strings.ToLower(cmd.Name()); n == "set" || n == "setnx" {
			c.Add(1)
		}
		return next(ctx, cmd)
	}
}

func BenchmarkContenders(b *testing.B) {
	server := testserver.RedisForTest(b, testserver.RedisConfig{})
	for _, n := range []struct{ processes, goroutines int }{{2, 1}, {10, 1}, {10, 20}} {
		for _, kind := range []struct{ name, kind string }{
			{"dchannel", "wait"}, {"dchannel-fair", "fair"}, {"redsync", "redsync"},
		} {
			b.Run(fmt.Sprintf("%d/%s", n.processes*n.goroutines, kind.name), func(b *testing.B) {
				var all lockproof.Figures
				for i := 0; b.Loop(); i++ {
					f, err := lockproof.Contend(b.Context(), lockproof.Contest{
						Addr: server.Addr(), Channel: fmt.Sprint(b.Name(), i), Kind: kind.kind,
						Processes: n.processes, Goroutines: n.goroutines, Work: time.Millisecond,
					})
					if err != nil {
						b.Fatal(err)
					}
					if f.Overlaps > 0 || f.Locks != n.processes*n.goroutines {
						b.Fatalf("two held the lock at a time, or not all did: %v", f)
					}
					all.Locks += f.Locks
					all.Attempts += f.Attempts
					all.HandOver = append(all.HandOver, f.HandOver...)
				}
				ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
				b.ReportMetric(all.PerLock(), "attempts/lock")
				b.ReportMetric(ms(all.HandOver.Mean()), "ms-hand-over")
				b.ReportMetric(ms(all.HandOver.At(0.99)), "ms-p99")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
