package lockproof

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// Contender is a kind of lock that [Contend] can measure: it connects to addr, once in
// each process. lock, which goroutines call at the same time, waits for the lock; attempts
// tells how many times the server was asked for it.
type Contender func(addr, name string) (lock func(context.Context) (unlock func() error, err error), attempts func() int64, err error)

// Contest says who wants one lock, each of them once.
type Contest struct {
	Addr, Channel string
	// Kind is "wait" or "fair", or one of those that [Child] was given.
	Kind                  string
	Processes, Goroutines int
	// Work is for how long the lock is held.
	Work time.Duration
}

// Figures tell how a contest went.
type Figures struct {
	Locks, Attempts, Overlaps int
	HandOver                  times // from before the release to behind the next one's LockFor
	Total                     time.Duration
}

// PerLock is how many attempts there were for each lock.
func (f Figures) PerLock() float64 { return float64(f.Attempts) / float64(max(f.Locks, 1)) }

func (f Figures) String() string {
	return fmt.Sprintf("%d locks in %v, %d attempts (%.2f per lock), %d overlaps, handed over in: %v",
		f.Locks, f.Total.Round(time.Millisecond), f.Attempts, f.PerLock(), f.Overlaps, f.HandOver)
}

// Contend starts the processes, lets all of them go at once, and waits for their ends.
func Contend(ctx context.Context, c Contest) (f Figures, err error) {
	var all []*process
	defer func() {
		for _, p := range all {
			p.kill()
		}
	}()
	for range c.Processes {
		p, err := spawn(spec{Role: "contend", Addr: c.Addr, Channel: c.Channel, Kind: c.Kind, Contenders: c.Goroutines, Work: c.Work})
		if err != nil {
			return f, err
		}
		all = append(all, p)
	}
	for _, p := range all {
		if _, err := p.expect(ctx, "ready"); err != nil {
			return f, err
		}
	}
	for _, p := range all {
		if err := p.say("go"); err != nil {
			return f, err
		}
	}
	var spans [][2]int64
	for _, p := range all {
		e, err := p.expect(ctx, "done")
		if err != nil {
			return f, err
		}
		f.Attempts += int(e.Attempts)
		spans = append(spans, e.Spans...)
	}
	f.Locks = len(spans)
	slices.SortFunc(spans, func(a, b [2]int64) int { return int(a[0] - b[0]) })
	for i := 1; i < len(spans); i++ {
		d := time.Duration(spans[i][0] - spans[i-1][1])
		if d < 0 {
			f.Overlaps++
		}
		f.HandOver = append(f.HandOver, d)
	}
	if f.Locks > 0 {
		f.Total = time.Duration(spans[f.Locks-1][1] - spans[0][0])
	}
	return f, nil
}

// contend is a process with some of the contenders.
func contend(s spec, open Open, others map[string]Contender, p *parent) error {
	connect := others[s.Kind]
	if connect == nil {
		connect = channelLock(open, s.Kind == "fair")
	}
	lock, attempts, err := connect(s.Addr, s.Channel)
	if err != nil {
		return err
	}
	p.tell(event{What: "ready"})
	p.word()
	var (
		mu    sync.Mutex
		e     = event{What: "done"}
		wrong []error
		wg    sync.WaitGroup
	)
	for range s.Contenders {
		wg.Go(func() {
			unlock, err := lock(context.Background())
			var span [2]int64
			if err == nil {
				span[0] = time.Now().UnixNano()
				if s.Work > 0 {
					<-time.After(s.Work)
				}
				span[1] = time.Now().UnixNano()
				err = unlock()
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				wrong = append(wrong, err)
			} else {
				e.Spans = append(e.Spans, span)
			}
		})
	}
	wg.Wait()
	e.Attempts = attempts()
	if err := errors.Join(wrong...); err != nil {
		e.Error = err.Error()
	}
	p.tell(e)
	return nil
}

// channelLock is a channel's lock, with a handle for each contender.
func channelLock(open Open, fair bool) Contender {
	return func(addr, name string) (func(context.Context) (func() error, error), func() int64, error) {
		inner, err := open(addr)
		if err != nil {
			return nil, nil, err
		}
		b, err := spy(inner)
		if err != nil {
			return nil, nil, err
		}
		var attempts atomic.Int64
		b.onAcquire = func() { attempts.Add(1) }
		opts := []dchannel.LockOption{dchannel.WithWait()}
		if fair {
			opts = append(opts, dchannel.WithFair())
		}
		lock := func(ctx context.Context) (func() error, error) {
			ch := dchannel.New(name, b)
			_, err := ch.LockFor(ctx, time.Minute, opts...)
			return func() error { return errors.Join(ch.CloseLockedUntil(), ch.Detach()) }, err
		}
		// As other libraries are: connected before the first attempt.
		_, err = b.LockState(context.Background(), name)
		return lock, attempts.Load, err
	}
}
