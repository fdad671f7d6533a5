package redis_test

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/conformance"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// remote is a backend, and the proxy that its client goes through.
type remote struct {
	*redis.Backend
	proxy *faultproxy.Proxy
}

func TestConformance(t *testing.T) {
	const probe = 500 * time.Millisecond
	server := testserver.RedisForTest(t, testserver.RedisConfig{Persistence: testserver.AOFAlways})
	admin := goredis.NewClient(&goredis.Options{Addr: server.Addr(), MaintNotificationsConfig: noMaintenance})
	t.Cleanup(func() { admin.Close() })

	connect := func(opts ...redis.Option) func(t testing.TB) dchannel.Backend {
		return func(t testing.TB) dchannel.Backend {
			pprof.SetGoroutineLabels(context.Background()) // the proxy's goroutines are not the driver's
			proxy, err := faultproxy.New(server.Addr())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { proxy.Close() })
			client := goredis.NewClient(&goredis.Options{
				Addr: proxy.Addr(), DialTimeout: time.Second, ReadTimeout: time.Second, MaintNotificationsConfig: noMaintenance,
			})
			t.Cleanup(func() { client.Close() })
			opts := append([]redis.Option{quiet, redis.WithDurable(), redis.WithProbe(probe, probe)}, opts...)
			return &remote{redis.New(client, opts...), proxy}
		}
	}
	var asked atomic.Int64
	conformance.Run(t, conformance.Harness{
		New: connect(),
		Short: &conformance.Short{
			New:       connect(redis.WithNamespace("short"), redis.WithRetention(64, time.Second), redis.WithIdleExpiry(2*time.Second)),
			Few:       connect(redis.WithNamespace("few"), redis.WithRetention(64, redis.DefaultRetention)),
			Messages:  64,
			Retention: time.Second,
			Gone:      2 * time.Second,
		},
		Cut: func(t testing.TB, b dchannel.Backend) func() {
			p := b.(*remote).proxy
			if err := p.Refuse(true); err != nil {
				t.Error(err)
			}
			p.Cut()
			return heal(t, p)
		},
		Blackhole: func(t testing.TB, b dchannel.Backend) func() {
			p := b.(*remote).proxy
			p.Blackhole(faultproxy.Both)
			return heal(t, p)
		},
		LoseReply: func(_ testing.TB, b dchannel.Backend, channel string) {
			b.(*remote).proxy.CutBeforeReply([]byte(channel))
		},
		Pause: func(t testing.TB) func() {
			if err := server.Pause(); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := server.Resume(); err != nil {
					t.Error(err)
				}
			}
		},
		Restart: func(t testing.TB, kill bool) func() {
			end := server.Stop
			if kill {
				end = server.Kill
			}
			if err := end(); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := server.Restart(context.Background()); err != nil {
					t.Error(err)
				}
			}
		},
		LoseState: func(t testing.TB) {
			if err := admin.FlushAll(t.Context()).Err(); err != nil {
				t.Fatal(err)
			}
		},
		Upstreams: func(t testing.TB, channel string) int {
			n := 0
			for _, namespace := range []string{redis.DefaultNamespace, "short", "few"} {
				name := fmt.Sprintf("{%s/0}:c:%s", namespace, channel)
				subs, err := admin.PubSubNumSub(t.Context(), name).Result()
				if err != nil {
					t.Fatal(err)
				}
				n += int(subs[name])
			}
			return n
		},
		Connections: func(_ testing.TB, b dchannel.Backend) int { return b.(*remote).proxy.Connections() },
		Calls: func(t testing.TB) int {
			before := asked.Add(1) - 1
			text, err := admin.Info(t.Context(), "stats").Result()
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(text) {
				if v, ok := strings.CutPrefix(strings.TrimSpace(line), "total_commands_processed:"); ok {
					n, err := strconv.Atoi(v)
					if err != nil {
						t.Fatal(err)
					}
					return n - int(before)
				}
			}
			t.Fatal("INFO has no total_commands_processed")
			return 0
		},
		ProbeEvery: probe,
		Holds: func(t testing.TB, channel string) []string {
			names, err := admin.Keys(t.Context(), "*:"+channel).Result()
			if err != nil {
				t.Fatal(err)
			}
			return names
		},
		Eternal: func(t testing.TB) (eternal []string) {
			keys := admin.Scan(t.Context(), 0, "*", 1000).Iterator()
			for keys.Next(t.Context()) {
				ttl, err := admin.PTTL(t.Context(), keys.Val()).Result()
				if err != nil {
					t.Fatal(err)
				}
				if ttl == -1 { // go-redis passes Redis' "no TTL" on as it is
					eternal = append(eternal, keys.Val())
				}
			}
			if err := keys.Err(); err != nil {
				t.Fatal(err)
			}
			return eternal
		},
		Strict: true,
	})
}

func heal(t testing.TB, p *faultproxy.Proxy) func() {
	return func() {
		if err := p.Heal(); err != nil {
			t.Error(err)
		}
	}
}
