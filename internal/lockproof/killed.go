package lockproof

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/drivertest"
)

// KilledHolders kills (SIGKILL) processes that hold the lock and extend it, and prints how
// late, after the end of the lock's time by the server's clock, those were who wait for
// that in other processes: for the lock to be free, for the lock, and for that in the
// server's line where there is one. None may be later than limit. grain is the unit in
// which the server tells the time that is left.
func KilledHolders(t *testing.T, rig drivertest.Rig, ttl, grain time.Duration, rounds int, fair bool, limit time.Duration) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := spec{Role: "wait", Addr: rig.Server.Addr(), Channel: t.Name(), TTL: ttl}
	start := func(s spec) *process {
		p, err := spawn(s)
		require.NoError(t, err)
		t.Cleanup(p.kill)
		return p
	}
	watcher, locker := start(s), start(s)
	lk, ok := rig.Connect(t, rig.Server.Addr()).(dchannel.Locker)
	require.True(t, ok, "the backend has no locks")

	late := map[string]times{}
	for n := range rounds {
		s.Role = "hold"
		holder := start(s)
		held, err := holder.expect(ctx, "held")
		require.NoError(t, err)
		how := "wait"
		if fair && n%2 == 1 {
			how = "fair"
		}
		require.NoError(t, watcher.say("watch"))
		require.NoError(t, locker.say(how))
		for _, p := range []*process{watcher, locker} {
			_, err := p.expect(ctx, "waiting")
			require.NoError(t, err)
		}
		holder.kill()
		at := time.Now()
		st, err := lk.LockState(ctx, s.Channel)
		require.NoError(t, err)
		require.True(t, st.Held)
		require.Equal(t, held.Fence, st.Fence)
		over := at.Add(st.Remaining) // or up to a grain sooner: it is rounded up
		e, err := watcher.expect(ctx, "watch")
		require.NoError(t, err)
		assert.Equal(t, dchannel.LockExpired.String(), e.Outcome)
		late["who waits for the end"] = append(late["who waits for the end"], time.Unix(0, e.At).Sub(over))
		e, err = locker.expect(ctx, how)
		require.NoError(t, err)
		assert.Greater(t, e.Fence, held.Fence)
		who := map[string]string{"wait": "who waits for the lock", "fair": "who stands in line"}[how]
		late[who] = append(late[who], time.Unix(0, e.At).Sub(over))
		_, err = locker.expect(ctx, "released")
		require.NoError(t, err)
	}
	for who, x := range late {
		t.Logf("the holder was killed %d times, TTL %v: %s is this late: %v", len(x), ttl, who, x)
		assert.LessOrEqual(t, x.At(1), limit)
		assert.GreaterOrEqual(t, x.At(0), -grain, "before the time was over")
	}
}

// hold is a process that holds the lock until it is killed.
func hold(s spec, open Open, p *parent) error {
	b, err := open(s.Addr)
	if err != nil {
		return err
	}
	h, err := dchannel.New(s.Channel, b).LockFor(context.Background(), s.TTL, dchannel.WithAutoExtend(), dchannel.WithWait())
	if err != nil {
		return err
	}
	p.tell(event{What: "held", Fence: h.Fence()})
	<-h.Context().Done()
	return fmt.Errorf("the hold is over: %w", context.Cause(h.Context()))
}

// wait is a process that waits in the ways that it is told, and says when it does so.
func wait(s spec, open Open, p *parent) error {
	inner, err := open(s.Addr)
	if err != nil {
		return err
	}
	b, err := spy(inner)
	if err != nil {
		return err
	}
	held := make(chan struct{}, 1)
	b.onState = func(_ string, st dchannel.LockState) {
		if st.Held {
			select {
			case held <- struct{}{}:
			default:
			}
		}
	}
	ctx := context.Background()
	ch := dchannel.New(s.Channel, b)
	for how := p.word(); how != ""; how = p.word() {
		select {
		case <-held: // of the last round
		default:
		}
		e := event{What: how}
		waited := make(chan error, 1)
		go func() {
			var err error
			switch how {
			case "watch":
				var o dchannel.LockOutcome
				o, err = ch.WaitUnlocked(ctx)
				e.Outcome = o.String()
			default:
				opts := []dchannel.LockOption{dchannel.WithWait()}
				if how == "fair" {
					opts = append(opts, dchannel.WithFair())
				}
				var h *dchannel.Hold
				if h, err = ch.LockFor(ctx, s.TTL, opts...); err == nil {
					e.Fence = h.Fence()
				}
			}
			e.At = time.Now().UnixNano()
			waited <- err
		}()
		<-held
		p.tell(event{What: "waiting"})
		if err := <-waited; err != nil {
			return err
		}
		p.tell(e)
		if how != "watch" {
			if err := ch.CloseLockedUntil(); err != nil {
				return err
			}
			p.tell(event{What: "released"})
		}
	}
	return nil
}
